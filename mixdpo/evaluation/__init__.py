"""What a finished run is worth: held-out preferences, new users, completions, exported experts."""
