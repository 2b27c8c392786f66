"""What the other rooms use: errors, limits, strict parsing, certificates, signatures, trust roots."""
