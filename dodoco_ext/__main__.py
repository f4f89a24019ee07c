"""`python -m dodoco_ext` is the command `dodoco`."""

from __future__ import annotations

from dodoco_ext.cli import main

if __name__ == "__main__":
    main()
