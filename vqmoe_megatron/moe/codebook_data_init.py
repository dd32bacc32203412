"""Initialise a codebook from the first tokens its layer sees, equally on all replicas.

T local tokens, H hidden size, C code slices, K codes per slice.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from vqmoe_megatron.moe.context_cut import in_order
from vqmoe_megatron.vq.code_map import CodeMap, build_code_map
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.segment_sum import count_ids


@torch.no_grad()
def initialize_codebook(
    codebook: Codebook,
    code_map: CodeMap,
    prepared: torch.Tensor,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Set codes and code map from the first microbatch of the first data-parallel rank.

    That microbatch holds the same samples at every data-parallel size, and gathering it over the
    tensor- and context-parallel ranks restores its order, so every layout with the same micro batch
    size starts from the same codes. One rank computes, the others receive: replicas are bit-equal.

    Args:
        codebook: to be initialised.
        code_map: to be built for the new codes (balanced and clustered need them).
        prepared: ``[T, H]`` this rank's tokens in the codebook's space.
        pg_collection: ``tp_cp`` (gathers the parts of the sequence) and ``tp_dp_cp`` (all replicas
            of this layer; pipeline stages hold other layers, so never the world).

    A microbatch with NaN or Inf, which would break the codebook for good, initialises nothing; the
    next forward tries again.

    Communicates: one all-gather over ``tp_cp``, two broadcasts over ``tp_dp_cp``. All ranks of
    those groups must call it together, as they do in a forward pass.
    """
    tokens = prepared.detach().float().contiguous()
    parts = [torch.empty_like(tokens) for _ in range(pg_collection.tp_cp.size())]
    torch.distributed.all_gather(parts, tokens, group=pg_collection.tp_cp)
    replicas = pg_collection.tp_dp_cp
    codes = codebook.codes.data.clone()
    if replicas.rank() == 0:
        sample = in_order(torch.cat(parts).chunk(pg_collection.cp.size()), 0)  # tp runs faster
        if bool(torch.isfinite(sample).all()):
            codebook.initialize_from(sample)
            _assign_map(codebook, code_map, sample)
            codes.copy_(codebook.codes.data)
        else:
            codes.fill_(float("nan"))  # tells the replicas: not from this microbatch
    source = torch.distributed.get_global_rank(replicas, 0)
    expert_of_row = code_map.expert_of_row.clone()
    torch.distributed.broadcast(codes, src=source, group=replicas)
    torch.distributed.broadcast(expert_of_row, src=source, group=replicas)
    if bool(torch.isfinite(codes).all()):
        codebook.adopt(codes)
        code_map.assign(expert_of_row)


def _assign_map(codebook: Codebook, code_map: CodeMap, sample: torch.Tensor) -> None:
    vectors = codebook.code_vectors().detach()
    ids = codebook.search(sample.to(vectors.device))
    load = torch.stack([count_ids(ids[:, c], codebook.num_codes) for c in range(ids.shape[1])])
    built = build_code_map(codebook.vq.code_map, vectors, load, code_map.num_experts)
    code_map.assign(built.to(code_map.expert_of_row.device))
