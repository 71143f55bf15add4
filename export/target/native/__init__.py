"""A decoder built from OpenVINO's own operators, its weights quantised with numpy: no torch."""
