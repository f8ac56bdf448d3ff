"""Formats in blocks: their QConfigs, and the axes along which blocks and dynamic groups lie."""
