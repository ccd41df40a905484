"""Is this set-up sound, and is it worth its GPU hours? Asked before a run."""
