"""The target on OpenVINO: paged attention with tree masks."""
