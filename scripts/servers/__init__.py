"""The servers of scripts/test_servers: how each is installed, started and asked."""
