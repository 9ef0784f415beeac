"""Trains click-through-rate and ranking models on sharded embedding tables that grow."""
