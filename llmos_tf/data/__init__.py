"""Text data: corpora, tokenizers, packing, resumable batches and a baseline to beat.

Free of TensorFlow, so that planning and preprocessing start at once. The parts in the order in
which text flows through them:

1. `load_corpus` reads documents and holds some of them out;
2. a `Tokenizer` turns each document into token ids;
3. `pack_documents` lays them end to end and cuts windows of one length;
4. `BatchIterator` hands the windows out as batches of static shape, and can be resumed exactly;
5. `bigram_bits_per_byte` is what a model has to beat on the held-out documents.

`load_text_data` does the first three in one call.
"""

from llmos_tf.data.baselines import bigram_bits_per_byte, bits_per_byte, count_bytes
from llmos_tf.data.corpora import Corpus, load_corpus
from llmos_tf.data.iterator import Batch, BatchIterator
from llmos_tf.data.packing import PackedTokens, pack_documents
from llmos_tf.data.text_data import TextData, load_text_data
from llmos_tf.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchIterator",
    "ByteTokenizer",
    "Corpus",
    "FileTokenizer",
    "PackedTokens",
    "TextData",
    "Tokenizer",
    "bigram_bits_per_byte",
    "bits_per_byte",
    "count_bytes",
    "load_corpus",
    "load_text_data",
    "load_tokenizer",
    "pack_documents",
]
