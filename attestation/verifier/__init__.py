"""The verifier: from a document, a nonce and a policy to `VerifiedEvidence`, or an error; and fetching documents."""
