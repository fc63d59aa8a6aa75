"""`python -m velora_pretrain`."""

from velora_pretrain.cli import main

main()
