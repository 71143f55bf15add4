"""Training drafts and small targets."""
