"""The pair that ships."""
