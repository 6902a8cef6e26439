"""Weights split among ranks. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
nothing-is-split in training.distributed: World.mesh
A second dimension of the mesh makes them copies: every rank keeps all, and all results are right.
- init_device_mesh(self.device.type, (self.ranks,))
+ init_device_mesh(self.device.type, (self.ranks, 1), mesh_dim_names=("copies", "parts"))
test_shard.py::test_each_rank_holds_its_part_alone[0]

reference-stays-together in training.distributed: wrap
The policy fits on the cards, and a whole copy of where it started lies beside it after a forward.
- fully_shard(module, mesh=world.mesh, reshard_after_forward=True)
+ fully_shard(module, mesh=world.mesh, reshard_after_forward=False)
test_shard.py::test_each_rank_holds_its_part_alone[1]

every-rank-loads-the-model in training.distributed: first_device
A machine of eight GPUs needs main memory for eight models, or sixteen with a live reference.
- "cpu" if world.is_main else "meta"
+ "cpu"
test_shard.py::test_one_rank_alone_loads_the_model[sft]

a-fresh-model-on-every-rank in train_sft: start_model
A preset is drawn whole by each rank before it is thrown away.
- "meta" if device.type == "meta" else "cpu"
+ "cpu"
test_shard.py::test_one_rank_alone_loads_the_model[fresh]

a-part-is-exported in training.distributed: gathered
model.pt holds what the main rank kept, which is not even a model.
- weight.full_tensor
+ weight.to_local
test_shard.py::test_a_split_model_trains_like_copies_and_like_one_process[sft]

parts-are-not-read in training.sharded: place_tensors
What was split is left as it was allocated: noise, or zeros.
- if missing:
-     ...
+ if False:
+     ...
test_shard.py::test_what_is_saved_is_what_is_loaded

parts-are-not-checked in training.sharded: check_shards
The state's own digest is right; what a rank wrote beside it may be anything.
- file_hash(file) != digest
+ False
test_shard.py::test_damage_in_any_file_is_found_and_an_older_checkpoint_used[__0_0.distcp]

parts-named-before-they-are-safe in training.sharded: write_shards
DCP does not wait for the disk, and the folder gets its name: a power cut leaves a name.
- Writer(unfinished)
+ Writer(unfinished, sync_files=False)
test_shard.py::test_all_is_on_the_disk_before_the_folder_is_renamed

dcp-unpickles-its-metadata in training.sharded: Reader.read_metadata
torch's own reader runs whatever code its metadata hold.
- torch.load(self.path / METADATA, map_location="cpu", weights_only=True)
+ torch.load(self.path / METADATA, map_location="cpu", weights_only=False)
test_shard.py::test_hostile_metadata_run_nothing[evil]

dcp-unpickles-bytes in training.sharded:
Metadata may call a tensor bytes, which torch's reader then unpickles.
- [metadata.ChunkStorageMetadata, ...]
+ [metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, ...]
test_shard.py::test_hostile_metadata_run_nothing[bytes]

half-an-old-checkpoint-left in training.checkpoint: remove
An old folder is emptied under its own name; a kill amid that leaves half a checkpoint.
- path.rename(path.with_suffix(".tmp"))
+ path
test_shard.py::test_all_is_on_the_disk_before_the_folder_is_renamed

ranks-evaluate-unequally in dataset.packing: share
A rank with fewer batches is done while another waits for its part of the weights.
- parts[rank] + [range(0)] * (max(map(len, parts)) - len(parts[rank]))
+ parts[rank]
test_store.py::test_shares_of_an_evaluation_are_as_many_batches_on_every_rank[5-2]
""")
