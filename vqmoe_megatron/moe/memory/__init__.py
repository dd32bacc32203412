"""Code memory: rows that tokens read by their codes, owned by experts, known before layer one."""
