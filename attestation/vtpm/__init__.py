"""SEV-SNP behind a paravisor (Azure): its report, the quote of its virtual TPM, and the device that makes them."""
