"""Routers: Megatron routers, which choose the experts of tokens; one file each."""
