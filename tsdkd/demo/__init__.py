"""The embedded default: arithmetic word problems, two tiny models, and a run that shows what TSD-KD changes."""
