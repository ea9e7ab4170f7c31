"""Private synthetic tables: columns, and DP-TBART."""
