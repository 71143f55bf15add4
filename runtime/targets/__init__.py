"""The models whose words count."""
