"""Single parts timed by themselves: verification, the evidence endpoint, refusals, the gateway."""
