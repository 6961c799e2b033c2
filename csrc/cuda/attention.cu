#include <stdexcept>

#include "pop/attention.h"
namespace pop::cuda {
int64_t attention_workspace(const Attention&) { return 0; }
void attention(const Attention&, void*, Stream) { throw std::runtime_error("pop::attention: not here yet"); }
}  // namespace pop::cuda
