"""Checkpoints of a training run, written with megatron-core's dist_checkpointing (torch_dist).

SAVE/iter_0000200/     .metadata  __0_0.distcp ...  common.pt  metadata.json    megatron-core's files
                       config.json  vocab.json ...                             so that `--load` reads it
                       manifest.json                                           size and hash of every file
SAVE/latest_checkpointed_iteration.txt                                         as in Megatron-LM, for people
SAVE/.iter_0000300.partial/                                                    being written
"""
