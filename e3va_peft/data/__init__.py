"""Images with classes, label maps or objects: one file for each format, for splits and for checks."""
