"""The device: attends, trains on its own shard, sends the change of the weights."""
