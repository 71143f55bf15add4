"""What a terminal shows: notices, progress bars."""
