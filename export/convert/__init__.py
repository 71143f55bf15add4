"""Exporting with torch: other architectures through optimum-intel, data-aware 4 bits through nncf."""
