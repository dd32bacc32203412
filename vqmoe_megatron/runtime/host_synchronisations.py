"""Where a training step makes the host wait for the device, and why: all of it, by name.

Places are those of ``device_purity``: module and function that ask. A test takes whole steps of
the real model and refuses what is not named here, and a name that nothing needs any more.
"""

from __future__ import annotations

# In every step.
OF_EVERY_STEP = {
    "vqmoe_megatron.moe.dispatch:dispatch": "split sizes of rows that travel between ranks follow "
    "from the tokens, and the collectives take them as numbers; none at EP = ETP = 1",
    "vqmoe_megatron.moe.expert_engine:read_num_rows": "threshold routing gives a token any number "
    "of experts, so the rows that travel are as many as the data say",
    "vqmoe_megatron.moe.memory.row_plan:read": "how many rows of a code memory ranks ask each "
    "other for, once per microbatch for all layers; none as a table, none at EP = ETP = 1",
    "vqmoe_megatron.engines.megatron.step:__call__": "the loop goes on by what all ranks saw: a "
    "loss or gradient that is not finite, a request to stop or to save",
    "megatron.core.distributed.finalize_model_grads:finalize_model_grads": "with "
    "calculate_per_token_loss Megatron divides by the tokens of the batch if there are any",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32": "Megatron clips by a number",
    "megatron.core.utils:local_multi_tensor_l2_norm": "Megatron's gradient norm where neither "
    "Transformer Engine nor Apex is installed: one read per parameter, one copy back",
}
# Once: before the first step of a process, or after a checkpoint was loaded.
OF_THE_FIRST_STEP = {
    "vqmoe_megatron.moe.codebook_data_init:initialize_codebook": "a codebook that starts from data "
    "must know that they are finite",
    "vqmoe_megatron.vq.codebook:initialize_from": "one rank chooses the codes on its host",
    "vqmoe_megatron.vq.codebook:adopt": "and brings them back",
    "vqmoe_megatron.vq.code_map:balanced_map": "the map of codes to experts is made on the host",
    "vqmoe_megatron.vq.code_map:clustered_map": "likewise",
    "vqmoe_megatron.moe.codebook_data_init:_assign_map": "and copied to the device",
    "vqmoe_megatron.moe.code_rows:place_code_rows": "shapes of code space follow from that map, "
    "which never changes again",
    "vqmoe_megatron.vq.host_draws:read": "the number of steps taken so far seeds the choice of "
    "tokens for dead codes; later steps get it without waiting",
}
