"""What runs the programs on a cluster; it knows them only as commands."""
