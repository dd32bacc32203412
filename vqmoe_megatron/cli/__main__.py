"""``python -m vqmoe_megatron.cli`` is ``vqmoe``."""

from vqmoe_megatron.cli import main

if __name__ == "__main__":
    main()
