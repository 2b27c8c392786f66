"""AMD SEV-SNP: attestation reports, the certificates that sign them, and the devices that make them."""
