"""Rank 0: loads data, keeps the step loop, hosts the store, spawns and watches the sidecars."""
