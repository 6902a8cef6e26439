"""Weights split among ranks. See tests/mutants.py."""

from tests.planted.mutant import Mutant

SHARD = "tests/test_shard.py::"

MUTANTS = [
    Mutant(
        "nothing-is-split",
        "A second dimension of the mesh makes them copies: every rank keeps all, and all results are right.",
        "training.distributed",
        "World.mesh",
        "init_device_mesh(self.device.type, (self.ranks,))",
        'init_device_mesh(self.device.type, (self.ranks, 1), mesh_dim_names=("copies", "parts"))',
        SHARD + "test_each_rank_holds_its_part_alone[0]",
    ),
    Mutant(
        "reference-stays-together",
        "The policy fits on the cards, and a whole copy of where it started lies beside it after a forward.",
        "training.distributed",
        "wrap",
        "fully_shard(module, mesh=world.mesh, reshard_after_forward=True)",
        "fully_shard(module, mesh=world.mesh, reshard_after_forward=False)",
        SHARD + "test_each_rank_holds_its_part_alone[1]",
    ),
    Mutant(
        "every-rank-loads-the-model",
        "A machine of eight GPUs needs main memory for eight models, or sixteen with a live reference.",
        "training.distributed",
        "first_device",
        '"cpu" if world.is_main else "meta"',
        '"cpu"',
        SHARD + "test_one_rank_alone_loads_the_model[sft]",
    ),
    Mutant(
        "a-fresh-model-on-every-rank",
        "A preset is drawn whole by each rank before it is thrown away.",
        "train_sft",
        "start_model",
        '"meta" if device.type == "meta" else "cpu"',
        '"cpu"',
        SHARD + "test_one_rank_alone_loads_the_model[fresh]",
    ),
    Mutant(
        "a-part-is-exported",
        "model.pt holds what the main rank kept, which is not even a model.",
        "training.distributed",
        "gather",
        "weight.full_tensor",
        "weight.to_local",
        SHARD + "test_a_split_model_trains_like_copies_and_like_one_process[sft]",
    ),
    Mutant(
        "parts-are-not-read",
        "What was split is left as it was allocated: noise, or zeros.",
        "training.sharded",
        "place_tensors",
        "if missing:\n"
        "    ...",
        "if False:\n"
        "    ...",
        SHARD + "test_what_is_saved_is_what_is_loaded",
    ),
    Mutant(
        "parts-are-not-checked",
        "The state's own digest is right; what a rank wrote beside it may be anything.",
        "training.sharded",
        "check_shards",
        "file_hash(file) != digest",
        "False",
        SHARD + "test_damage_in_any_file_is_found_and_an_older_checkpoint_used[__0_0.distcp]",
    ),
    Mutant(
        "parts-named-before-they-are-safe",
        "DCP does not wait for the disk, and the folder gets its name: a power cut leaves a name.",
        "training.sharded",
        "write_shards",
        "Writer(unfinished)",
        "Writer(unfinished, sync_files=False)",
        SHARD + "test_all_is_on_the_disk_before_the_folder_is_renamed",
    ),
    Mutant(
        "dcp-unpickles-its-metadata",
        "torch's own reader runs whatever code its metadata hold.",
        "training.sharded",
        "Reader.read_metadata",
        'torch.load(self.path / METADATA, map_location="cpu", weights_only=True)',
        'torch.load(self.path / METADATA, map_location="cpu", weights_only=False)',
        SHARD + "test_hostile_metadata_run_nothing[evil]",
    ),
    Mutant(
        "dcp-unpickles-bytes",
        "Metadata may call a tensor bytes, which torch's reader then unpickles.",
        "training.sharded",
        "",
        "[metadata.ChunkStorageMetadata, ...]",
        "[metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, ...]",
        SHARD + "test_hostile_metadata_run_nothing[bytes]",
    ),
    Mutant(
        "half-an-old-checkpoint-left",
        "An old folder is emptied under its own name; a kill amid that leaves half a checkpoint.",
        "training.checkpoint",
        "remove",
        'path.rename(path.with_suffix(".tmp"))',
        "path",
        SHARD + "test_all_is_on_the_disk_before_the_folder_is_renamed",
    ),
    Mutant(
        "ranks-evaluate-unequally",
        "A rank with fewer batches is done while another waits for its part of the weights.",
        "dataset.packing",
        "share",
        "mine, most = range(rank, rows, ranks), len(range(0, rows, ranks))",
        "mine = range(rank, rows, ranks)\n"
        "most = len(mine)",
        "tests/test_store.py::test_shares_of_an_evaluation_are_as_many_batches_on_every_rank[5-2]",
    ),
]
