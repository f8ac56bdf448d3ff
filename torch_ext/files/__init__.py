"""Files of ranges and statistics: written atomically, validated when read, merged and compared."""
