"""The transformer and its experts. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
# ---- The transformer

prefix-mask-top-left in model.attention: causal_bias
With a prefix there are more keys than queries; a mask that starts at the first key hides most.
- keys - queries + 1
+ 1
test_model.py::test_causal_attention_equals_sdpa_with_a_mask[1-1-5]

future-is-visible in model.attention: AttentionBlock.of_trees
Off by one in the mask: each token sees the next one, which it is asked to predict.
- bias[start - first : end - first, start - first : end - first].triu_(1)
+ bias[start - first : end - first, start - first : end - first].triu_(2)
test_stream.py::test_who_sees_whom[forked-128]

strangers-share-a-mask in model.attention: AttentionBlock.of_trees
Pairs that attend in one call see their neighbours, as in packing without a block mask.
- bias[start - first : end - first, start - first : end - first].triu_(1)
+ bias[start - first : end - first, : end - first].triu_(start - first + 1)
test_stream.py::test_who_sees_whom[twin-128]

keys-before-their-context in model.attention: attend_in_blocks
A block's own keys come before those that its mask has first, so that its own future is seen.
- key = torch.cat([*(keys[index] for index in block.context), key], dim=1)
- value = torch.cat([*(values[index] for index in block.context), value], dim=1)
+ key = torch.cat([key, *(keys[index] for index in block.context)], dim=1)
+ value = torch.cat([value, *(values[index] for index in block.context)], dim=1)
test_stream.py::test_who_sees_whom[forked-2]

sdpa-is-causal in model.attention: attention
SDPA's is_causal aligns the queries with the first keys, which is wrong where there is a prefix.
- (heads, queries, size), groups = q.shape, len(k)
+ return torch.nn.functional.scaled_dot_product_attention(    q, k, v, is_causal=True, enable_gqa=True)
+ (heads, queries, size), groups = q.shape, len(k)
test_stream.py::test_forked_equals_twin[plain]

gqa-head-order in model.attention: attention
Query heads share key heads in the other order; checkpoints load, and speak nonsense.
- q.reshape(groups, heads // groups * queries, size)
+ q.unflatten(0, (-1, groups)).transpose(0, 1).reshape(groups, heads // groups * queries, size)
test_model.py::test_forward_equals_the_formulas[plain]

scores-not-scaled in model.attention: attention
Scores that are not divided by sqrt(D) saturate the softmax.
- torch.baddbmm(bias, q, k.mT, alpha=size**-0.5)
+ torch.baddbmm(bias, q, k.mT)
test_model.py::test_forward_equals_the_formulas[plain]

rope-neighbours in model.rotary: rotate
Pairs of neighbours are turned instead of halves: Llama's weights load and mean something else.
- x.chunk(2, dim=-1)
+ (x[..., 0::2], x[..., 1::2])
test_model.py::test_rope_turns_halves_not_neighbours

rope-in-bf16 in model.rotary: rotary
Positions above 256 collide in bf16.
- positions[:, None, None]
+ positions[:, None, None].bfloat16()
test_model.py::test_rope_angles_are_float32_under_autocast

qk-norm-after-rope in model.transformer: Attention.forward
The gains of a norm differ by coordinate, so norm and rotation must not change places.
- rotate(self.q_norm(q), rotation)
+ self.q_norm(rotate(q, rotation))
test_model.py::test_forward_equals_the_formulas[qk_norm]

head-not-tied in model.transformer: Transformer.logits
Scores are read off another tensor than the embeddings, or not at all.
- self.embed_tokens.weight
+ self.embed_tokens.weight.detach()
test_losses.py::test_gradient_equals_finite_differences[forked]

log-softmax-in-bf16 in model.transformer: token_logps
CPU autocast leaves log_softmax in bf16; over 512 tokens the sum is off by nats.
- -F.cross_entropy(at_least_float32(logits), targets, reduction="none")
+ logits.bfloat16().log_softmax(-1).gather(1, targets[:, None])[:, 0]
test_model.py::test_log_softmax_is_float32_even_of_bf16_scores[True]

embeddings-decayed in training.schedule: adamw
Weight decay pulls the embeddings of rare tokens to 0.
- {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
+ set()
test_model.py::test_weight_decay_is_for_matrices[all]

matrices-moved-twice in training.schedule: adamw
AdamW moves the matrices as well as Muon: they take two steps at a time, and the loss rises.
- p.requires_grad and name not in leave_out
+ p.requires_grad
test_model.py::test_muon_is_for_the_matrices_of_the_layers_and_adamw_for_the_rest

orthogonal-of-a-neighbour in training.muon: orthogonal
Matrices of one shape share a norm, so a small gradient gives a small step, and the layer hardly learns.
- x.norm(dim=(1, 2), keepdim=True)
+ x.norm()
test_model.py::test_orthogonal_maps_the_singular_values_alone[shape0]

# ---- Mixture of experts

expert-weights-of-all-experts in model.moe: MixtureOfExperts.forward
The chosen experts' weights sum to less than 1 where the checkpoint was trained with a sum of 1.
- weights / weights.sum(dim=-1, keepdim=True)
+ weights
test_moe.py::test_mixture_equals_a_loop_over_tokens_and_experts[shape0]

weight-of-the-other-expert in model.moe: MixtureOfExperts.forward
Each of a token's experts gets the weight of another one.
- weights[..., None]
+ weights.flip(-1)[..., None]
test_moe.py::test_mixture_equals_a_loop_over_tokens_and_experts[shape1]

experts-weighted-twice in model.moe: MixtureOfExperts.forward
What enters an expert is weighted, and what leaves it once more.
- x[order // self.chosen_per_token]
+ weights.flatten()[order, None] * x[order // self.chosen_per_token]
test_moe.py::test_mixture_equals_a_loop_over_tokens_and_experts[shape4]

experts-answer-other-tokens in model.moe: MixtureOfExperts.forward
What the experts said is not put back in the order of the tokens.
- outputs[order.argsort()]
+ outputs[order]
test_generate.py::test_cache_equals_the_full_forward[chunks0-experts]

shared-expert-not-gated in model.moe: MixtureOfExperts.forward
The shared expert counts in full for every token.
- self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
+ self.shared_expert(x)
test_moe.py::test_mixture_equals_a_loop_over_tokens_and_experts[shape3]

idle-experts-left-out in model.moe: MixtureOfExperts.forward
An expert without a token on one rank has no gradient there, and the other ranks wait for it.
- [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
+ [expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)]
test_moe.py::test_experts_without_a_token_have_zero_gradients_not_none[1]

balance-not-times-experts in model.moe: load_balance
Its least value then depends on how many experts there are, and so does what a coefficient means.
- experts * (chosen_share * mean_probability).sum()
+ (chosen_share * mean_probability).sum()
test_moe.py::test_balance_is_k_when_even_and_rises_to_the_number_of_experts[4-2]

balance-of-no-tokens in model.moe: load_balance
A rank without a record divides by 0, and its NaN is what all ranks log.
- max(1, len(probabilities))
+ len(probabilities)
test_moe.py::test_experts_without_a_token_have_zero_gradients_not_none[0]

balance-whole-in-every-micro-batch in training.objective: Objective.training_losses
Each micro-batch adds the balance of a whole window: more micro-batches push the experts harder.
- model.config.router_aux_loss_coef * (aux_loss - aux_loss.detach())
+ model.config.router_aux_loss_coef * (aux_loss - aux_loss.detach()) * 7 / len(losses)
test_moe.py::test_each_window_counts_the_balance_once[dpo-150]

balance-of-the-reference in train_dpo: train
The frozen copy's balance is added: the figure is right at first, and moves no router.
- reference_logps = reference(stream)
+ reference_logps = reference(stream, balances.clear() or balances)
test_moe.py::test_each_window_counts_the_balance_once[dpo-500]

balance-without-its-coefficient in train_sft: train
The option is read, saved and shown, and never reaches the loss.
- model.config.router_aux_loss_coef * router_loss(balances)
+ router_loss(balances)
test_moe.py::test_each_window_counts_the_balance_once[sft-500]
""")
