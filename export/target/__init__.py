"""From a source to the IR of the target."""
