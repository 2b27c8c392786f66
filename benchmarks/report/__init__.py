"""Tables and the HTML report: metrics with intervals, and two sides compared."""
