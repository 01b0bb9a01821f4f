"""Records → a static site that opens from ``file://``: boards, pictures, a page per method and per cell. No torch."""
