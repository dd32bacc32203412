"""How a discrete path is evaluated: once per token, once per code, or once per code and step."""
