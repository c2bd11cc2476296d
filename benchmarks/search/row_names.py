"""The names of the systems in the result rows of the search benchmarks."""

OURS = "hashengine"
GRAPH = "hashengine graph"  # the search of OURS, replayed as a CUDA graph
ONE_QUERY = "hashengine one query"  # a search of only the first query of the batch
WHOLE_MAP = "hashengine mAP"  # mean average precision; in rows with it, OURS computes only the counts by distance

LABELLED = "hashengine with labels"  # in rows of the task count: also counts the relevant codes

ONE_THREAD = "hashengine one thread"
TENSOR = "hashengine tensor"  # the query is a tensor, not an array
OP = "hashengine op"  # the op instead of the index
NATIVE = "hashengine native"  # the native module, called without the index's checks
NATIVE_ONE_CODE = "hashengine native one code"  # the same with a database of one code: the call without its kernel

FAISS = "faiss"
PRODUCT = "torch product"  # matrix products in plain torch
XOR = "torch xor"  # XOR and bit counts in plain torch
COPY = "copy"  # of the codes, from host memory to the device
BARE_LOOP = "bare loop"  # a loop over cached codes that computes distances and stores nothing
READ = "read"  # a plain read of the codes
READ_BEYOND = "read beyond the cache"  # a plain read of a buffer that the last-level cache cannot hold

# Suffixes of the names above
HOST_TO_HOST = " host to host"  # queries and answers in host memory
ON_DEVICE = " on the device"  # the time of the device alone, without the CPU's wait for the answer
FROM_ACTIVATIONS = " from activations"  # first packs the signs of floating-point activations into queries
FROM_HOST = " from the host"  # adds codes that are in host memory
FROM_DEVICE = " from the device"  # adds codes that are on the device
