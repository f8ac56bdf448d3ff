"""Files of ranges and statistics: written atomically, read with distrust, merged and compared."""
