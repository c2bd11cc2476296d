"""The names of the systems in the result rows of the search benchmarks."""

OURS = "hashengine"
GRAPH = "hashengine graph"  # the same search, replayed as a CUDA graph
ONE_QUERY = "hashengine one query"  # the first query of the batch alone
WHOLE_MAP = "hashengine mAP"  # the whole metric; in such rows, OURS computes only the counts by distance

FAISS = "faiss"
PRODUCT = "torch product"
XOR = "torch xor"
COPY = "copy"
BARE_LOOP = "bare loop"
READ = "read"
READ_BEYOND = "read beyond the cache"

# Suffixes
HOST_TO_HOST = " host to host"  # queries and answers in host memory
ON_DEVICE = " on the device"  # the time of the device alone, without the CPU's wait for the answer
FROM_ACTIVATIONS = " from activations"  # packs the signs of floating-point activations first
FROM_HOST = " from the host"  # adds codes that are in host memory
FROM_DEVICE = " from the device"  # adds codes that are on the device
