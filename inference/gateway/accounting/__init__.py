"""What was used: counts in answers, records for bills, metrics."""
