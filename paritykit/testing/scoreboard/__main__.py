"""``python -m paritykit.testing.scoreboard``."""

from paritykit.testing.scoreboard.command import main

if __name__ == "__main__":
    main()
