"""``python -m trainer``: see ``trainer.cli``."""

from trainer.cli import main
from trainer.environment import start_with_settings

if __name__ == "__main__":
    start_with_settings()
    main()
