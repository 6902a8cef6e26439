"""What a step of train_dpo.py holds and takes: formulas of the model's shape, the stream's, and the flags.

Memory is the largest of a few moments of a step. `moments` says what is there in each, part by part, in the
order of model/transformer.py and of autograd's way back. docs/SCALE.md says how all this was checked against
measured peaks, and what of it is on paper only. DPO is here as a number: forwards of a frozen model.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from dataset.packing import LAYOUTS
from errors import InputError
from model import transformer
from model.lora import add_adapters
from model.stream import TokenStream
from model.transformer import ModelConfig, Transformer
from training.settings import flag

FLOAT = 4  # bytes of what is float32 whatever the precision: weights, gradients, moments, residual stream


@dataclass
class Plan:
    """The flags of training/plan.py: what the run will be told, and what the machine is."""

    model: str = flag("", "a preset, llama-3-8b, llama-3-70b, or a model folder, ours or Hugging Face's")
    vocab_size: int = flag(0, "ids of the tokenizer; a folder and the published shapes know their own")
    length: int = flag(512, "tokens of a prompt and a response, taken to be those of every pair")
    prompt: int = flag(0, "of which the prompt; 0 for a half")
    batch_size: int = flag(16, "pairs per optimizer step, over all GPUs and micro-batches")
    micro_batch_size: int = flag(32, "pairs per forward per GPU")
    layout: str = flag("forked", "as in train_dpo.py", LAYOUTS)
    reference: str = flag("live", "as in train_dpo.py", ("live", "cached"))
    precision: str = flag("bf16", "of the forward pass", ("fp32", "bf16"))
    checkpoint_activations: bool = flag(False, "as in train_dpo.py")
    lora_rank: int = flag(0, "as in train_dpo.py")
    fused_attention: bool = flag(False, "as in train_dpo.py")
    shard: bool = flag(False, "as in train_dpo.py")
    gpus: int = flag(1, "how many, over all nodes")
    device: str = flag(
        "cuda", "what is planned for; cpu serves to compare with measured peaks", ("cuda", "cpu")
    )
    memory: float = flag(80.0, "GiB of a GPU")
    tflops: float = flag(312.0, "what the GPU's data sheet says; bf16: A100 312, H100 989")
    share: float = flag(0.4, "how much of that the matrix products reach: a guess, measure yours")
    link: float = flag(50.0, "GB/s at which a GPU exchanges with the others")
    pairs: int = flag(0, "how many the data has, for the time of an epoch")

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "micro_batch_size", "gpus"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("memory", "tflops", "share", "link"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} must be above 0, not {getattr(self, name)}")
        self.prompt = self.prompt or self.length // 2
        if not 0 <= self.prompt < self.length:
            raise InputError(f"--prompt {self.prompt} leaves no response in --length {self.length}")

    @property
    def pairs_at_once(self) -> int:
        """The most pairs that one forward of training sees."""
        return min(self.micro_batch_size, -(-self.batch_size // self.gpus))

    @property
    def micro_batches(self) -> int:
        """Forwards of the policy per optimizer step and GPU."""
        return -(-self.batch_size // (self.gpus * self.pairs_at_once))

    @property
    def ranks(self) -> int:
        """Over how many GPUs weights, gradients and moments are divided."""
        return self.gpus if self.shard else 1


def make_stream(plan: Plan) -> TokenStream:
    """A micro-batch in which every pair is as long as can be: shapes without tokens, which is enough."""
    segments, end = [], 0
    answer = plan.length - plan.prompt
    for _ in range(plan.pairs_at_once):
        if plan.layout == "forked" and plan.prompt:
            prompt, middle = (end, end + plan.prompt), end + plan.length
            segments += [(*prompt, 0, 0), (prompt[1], middle, *prompt), (middle, middle + answer, *prompt)]
        else:
            middle = end + plan.length
            segments += [(end, middle, 0, 0), (middle, middle + plan.length, 0, 0)]
        end = segments[-1][1]
    tokens = torch.empty(end, dtype=torch.long, device="meta")
    targets = tokens.new_empty(2 * answer * plan.pairs_at_once)
    owners = 2 * plan.pairs_at_once
    return TokenStream(tokens, tokens, torch.tensor(segments), targets, targets, targets, owners)


# ---- Memory


@dataclass(frozen=True)
class Weights:
    """How many numbers a model has, and how many of them are trained."""

    total: int
    trained: int
    layer: int
    trained_layer: int

    @classmethod
    def of(cls, config: ModelConfig, plan: Plan) -> "Weights":
        one = replace(config, num_hidden_layers=1, rope_scaling=None)
        whole, whole_trained, layer, trained = count_weights(one, plan.lora_rank)
        others = config.num_hidden_layers - 1
        return cls(whole + others * layer, whole_trained + others * trained, layer, trained)


@cache
def count_weights(config: ModelConfig, lora_rank: int) -> list[int]:
    """All and the trained ones, of the model and of its layers: counted in one without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    if lora_rank:
        add_adapters(model, lora_rank, 1.0, "all", seed=0)
    parts = [list(part.parameters()) for part in (model, model.layers)]
    return [sum(p.numel() for p in part if p.requires_grad or all_of) for part in parts for all_of in (1, 0)]


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer in a forward and a backward of the stream, beside its weights."""

    attention: float  # what autograd keeps of it for backward
    feed_forward: float
    forward: float  # what comes and goes in a forward, at most
    attention_backward: float  # the same in backward, beside what is still kept
    feed_forward_backward: float

    @property
    def kept(self) -> float:
        return self.attention + self.feed_forward

    @classmethod
    def of(cls, config: ModelConfig, stream: TokenStream, plan: Plan) -> "Layer":
        T, d, inner = len(stream.tokens), config.hidden_size, config.intermediate_size
        q, k = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        low = plan.precision == "bf16"
        wide = 2 if low else FLOAT  # bytes of what a product reads and writes
        # CUDA's autocast makes a softmax in float32 and a copy of it in bf16, the CPU's makes it in bf16.
        made, kept = ((10, 6) if plan.device == "cuda" else (4, 2)) if low else (8, 4)
        blocks = [] if plan.fused_attention else stream.blocks
        scores = [0, *(config.num_attention_heads * block.bias.numel() for block in blocks)]
        # A block with a context has keys and values of its own, the context's copied before theirs.
        copied = sum(block.bias.shape[1] for block in blocks if block.context)

        # A norm keeps what enters it and, for its gain's gradient, what the gain multiplies.
        norm = FLOAT * (1 if plan.lora_rank else 2)
        # Products side by side read one tensor, but autocast casts it for each.
        attention = T * d * (norm + wide * (3 if low else 1))
        attention += wide * T * 2 * q  # the queries, and what o_proj reads
        attention += wide * (T + copied) * 2 * k + kept * sum(scores)  # keys, values, and who sees whom
        if plan.fused_attention:
            attention += T * (
                wide * q + FLOAT * config.num_attention_heads
            )  # its output, log-sum-exp of scores
        if config.qk_norm:
            attention += norm * T * (q + k)
        feed_forward = T * d * (norm + wide * (2 if low else 1))
        feed_forward += 4 * wide * T * inner  # gate, silu(gate), up, and their product, which down_proj reads
        passing = 2 * FLOAT * T * d  # the residual stream, or its gradient, before and after
        return cls(
            attention,
            feed_forward,
            forward=max(made * max(scores) + wide * T * (q + 2 * k), 3 * wide * T * inner) + passing,
            attention_backward=made * max(scores) + passing,
            feed_forward_backward=2 * wide * T * inner + passing,
        )


def moments(config: ModelConfig, stream: TokenStream, plan: Plan) -> dict[str, dict[str, float]]:
    """Bytes by part, on one GPU, at each moment of a step that can be its peak."""
    weights, layer = Weights.of(config, plan), Layer.of(config, stream, plan)
    layers, T, N = config.num_hidden_layers, len(stream.tokens), len(stream.targets)
    d, V = config.hidden_size, config.vocab_size
    low, lora, again = plan.precision == "bf16", plan.lora_rank > 0, plan.checkpoint_activations
    live = plan.reference == "live"

    held = {
        "weights": FLOAT * weights.total / plan.ranks,
        "reference": FLOAT * weights.total / plan.ranks if live and not lora else 0,
        "optimizer": 2 * FLOAT * weights.trained / plan.ranks,  # AdamW's two moments
    }
    gradient = FLOAT * weights.trained / plan.ranks
    before = gradient if plan.micro_batches > 1 else 0  # of the micro-batches before this one
    head = V * d
    head_gradient = 0 if lora else FLOAT * head

    split = plan.ranks > 1
    ends, trained_ends = (  # what is outside the layers: embedding, last norm, head
        whole - layers * layer
        for whole, layer in ((weights.total, weights.layer), (weights.trained, weights.trained_layer))
    )

    def exchange(of_ends: int, of_layers: int, trained_layers: int = 0) -> float:
        """DDP's buckets are a second copy of the gradients. With --shard what is whole beside the parts.

        That is weights put together, and buffers in which they came; and in backward gradients of layers:
        made, or laid out and on their way.
        """
        if not split:
            return FLOAT * weights.trained if plan.gpus > 1 else 0
        layer_weights = of_layers * weights.layer + trained_layers * weights.trained_layer
        return FLOAT * (of_ends * ends + layer_weights)

    def moment(gradients: float, copied: float, activations: float, logits: float, exchanged: float) -> dict:
        """`copied` weights have a copy in bf16."""
        others = {"exchange": exchanged, "bf16 weights": low * 2 * copied}
        return {**held, "gradients": gradients, **others, "activations": activations, "logits": logits}

    # What autograd keeps: of each layer all or what enters it; the rotation and the biases, which all layers
    # share; the final norm's, and what meets the vocabulary.
    each = FLOAT * T * d if again else layer.kept
    biases = 0 if plan.fused_attention else sum(block.bias.numel() for block in stream.blocks)
    shared = FLOAT * (T * config.head_dim + biases)
    whole = layers * each + shared + 3 * FLOAT * T * d + (2 if low else FLOAT) * N * d
    # Scores come all at once, or chunk by chunk and again in backward. Their log-softmax is kept.
    scores = V * min(N, max(1, transformer.LOGITS // V))
    chunked = scores < N * V
    made, kept = (2 * FLOAT + 2 * low) * scores, 0 if chunked else FLOAT * scores

    # Autograd keeps the bf16 copy of a matrix for backward, unless its layer is computed again.
    copied = weights.layer * (1 if again else layers) + head
    found = {"forward": moment(before, copied, whole, made, exchange(1, 1))}
    # Beside a layer that is put together lie the buffer in which it came and that of the layer before it;
    # beside the first, until it is there, that of the ends. Backward begins with the ends.
    if split:
        found["last layer, forward"] = moment(before, copied, whole + layer.forward, 0, exchange(1, 3))
        found["backward begins"] = moment(before, copied, whole, kept, exchange(2, 0))
    if split and live:
        found["reference begins"] = moment(before, copied, whole, kept, exchange(2, 2))
    if live:
        reading = copied + weights.layer
        found["reference"] = moment(before, reading, whole + layer.forward, kept, exchange(1, 3))
        found["reference's logits"] = moment(before, copied, whole, kept + made, exchange(1, 1))
    found["logits"] = moment(before, copied, whole, 3 * FLOAT * scores, exchange(1, 1))
    # The head's gradient, and in chunks what it is added to.
    head_done = before + head_gradient * (1 + chunked)
    found["head"] = moment(head_done, copied, whole, FLOAT * scores, exchange(1, 1))
    for name, left in (("last layer", layers), ("first layer", 1)):
        done = FLOAT * weights.trained_layer * (layers - left) / plan.ranks
        here = left * each + shared + again * (layer.kept - each)
        passed = here - layer.feed_forward
        for part, bytes_there in (
            ("feed-forward", here + layer.feed_forward_backward),
            ("attention", passed + layer.attention_backward),
        ):
            copied = weights.layer * (1 if again else left)
            # The head's stays whole up to the end. The layer that comes next is on its way already, the
            # gradients of the one before are still on theirs.
            gradients = before + head_gradient * split if before else done + head_gradient
            found[f"{name}, {part}"] = moment(gradients, copied, bytes_there, 0, exchange(1, 2, 2))
    # A tied matrix has two gradients and then their sum. With --shard they are whole, and then made parts of.
    if split:
        layers_done = FLOAT * weights.trained_layer * layers / plan.ranks
        all_done = (before or layers_done) + FLOAT * trained_ends
        all_done += 2 * head_gradient * config.tie_word_embeddings
    else:
        all_done = gradient + head_gradient * (2 if config.tie_word_embeddings else before > 0)
    found["embedding"] = moment(all_done, 0, FLOAT * T * d, 0, exchange(1, 0, 1))
    if lora and plan.ranks == 1:
        found["saving"] = held | {"merged weights": FLOAT * weights.total}
    return found


def peak(config: ModelConfig, stream: TokenStream, plan: Plan) -> tuple[str, dict[str, float]]:
    """Which moment needs most, and its bytes by part."""
    return max(moments(config, stream, plan).items(), key=lambda found: sum(found[1].values()))


# ---- Time


def forward_flops(config: ModelConfig, stream: TokenStream) -> int:
    """Multiplications and additions of matrix products that a forward of the stream cannot do without.

    Two for every weight of a layer and token; for scores and values, 4 D a query head and pair of tokens of
    which one sees the other; two for every entry of the vocabulary matrix and supervised token. Norms,
    softmax and rotary positions are left out, as is usual.
    """
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    d = config.hidden_size
    weights = d * (2 * queries + 2 * keys) + 3 * d * config.intermediate_size
    seen = 0
    for start, end, prefix_start, prefix_end in stream.segments.tolist():
        own = end - start
        seen += own * (prefix_end - prefix_start) + own * (own + 1) // 2
    per_layer = 2 * len(stream.tokens) * weights + 4 * queries * seen
    return config.num_hidden_layers * per_layer + 2 * len(stream.targets) * d * config.vocab_size


def step_flops(config: ModelConfig, stream: TokenStream, plan: Plan) -> int:
    """Those of one GPU in an optimizer step.

    A backward is two forwards, or one with LoRA, where weights have no gradient. To this come what backward
    computes again, and the frozen model's forward.
    """
    forward = forward_flops(config, stream)
    logits = 2 * len(stream.targets) * config.hidden_size * config.vocab_size
    flops = forward * (2 if plan.lora_rank else 3) + forward * (plan.reference == "live")
    flops += (forward - logits) * plan.checkpoint_activations
    flops += logits * (len(stream.targets) * config.vocab_size > transformer.LOGITS)
    return flops * plan.micro_batches


def exchanged_bytes(config: ModelConfig, plan: Plan) -> float:
    """What a GPU sends, and as much receives, in an optimizer step.

    DDP reduces gradients once, there and back. With --shard, in every micro-batch, weights come for a forward
    and for a backward, the frozen model's for its forward, and gradients go.
    """
    weights = Weights.of(config, plan)
    numbers = 2 * weights.trained
    if plan.shard:
        gathered = weights.total * (3 if plan.reference == "live" else 2)
        numbers = plan.micro_batches * (gathered + weights.trained)
    return FLOAT * numbers * (plan.gpus - 1) / plan.gpus


def step_seconds(config: ModelConfig, stream: TokenStream, plan: Plan) -> float:
    """Products and exchange go on side by side, so the slower of them counts. All else is in --share."""
    products = step_flops(config, stream, plan) / (plan.tflops * 1e12 * plan.share)
    return max(products, exchanged_bytes(config, plan) / (plan.link * 1e9))
