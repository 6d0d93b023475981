"""Small tokenizers of the kinds that can be read as bytes."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat thought that they had the hat", "naïve cats 😀 think", "12 hats and 345 cats, then a dog"]


def _wrapped(tokenizer, **names):
    tokenizer.decoder = tokenizer.decoder or decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", padding_side="left", **names)


def byte_level(size, corpus=CORPUS, special=(), **options):
    """Return byte-level BPE of `size` tokens, the first of them special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = ["<pad>", "<eos>", *special]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return _wrapped(tokenizer, pad_token="<pad>", **options)


def fallback(prepend=False):
    """Return BPE with byte fallback, which may put a space before every text."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<pad>", "<eos>", "<unk>", *spelled, *"▁theca", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] * prepend + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer, unk_token="<unk>", pad_token="<pad>")


def merging(*merges):
    """Return a tokenizer of the letters a, b and c with these merges."""
    names = ["<eos>", *"abc", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _wrapped(tokenizer)
