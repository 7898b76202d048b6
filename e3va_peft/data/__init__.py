"""Images with classes, label maps or objects: one file for each format, for splits and for checks."""

from e3va_peft.errors import require_train

require_train(__name__)
