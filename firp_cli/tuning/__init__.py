"""Choice of draft trees by measured costs and acceptance."""
