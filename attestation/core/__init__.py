"""What every other room here uses: errors, limits, strict parsing, certificates, signatures, trust roots."""
