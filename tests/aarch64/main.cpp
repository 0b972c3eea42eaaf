// Serves calls of the compiled module: reads each from standard input, with the memory that its addresses lie in, and
// writes its result and that memory to standard output. The other side is tests/tools/aarch64.py.
#include <pybind11/pybind11.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

void define_module(pybind11::module_& m);

namespace {

using pybind11::Value;

// Memory of the caller, with the same alignment here.
struct Block {
  Block(int64_t address, int64_t bytes) : size(bytes), memory(new char[bytes + 2 * kPage]) {
    const auto begin = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + (kPage - begin % kPage) + address % kPage;
  }

  static constexpr int64_t kPage = 4096;
  int64_t size;
  std::unique_ptr<char[]> memory;
  char* data;
};

void read_bytes(void* to, size_t size) {
  if (size && std::fread(to, size, 1, stdin) != 1) std::exit(0);  // the other side has ended
}

template <typename T>
T read() {
  T x;
  read_bytes(&x, sizeof(x));
  return x;
}

std::string read_text() {
  std::string x(read<int64_t>(), '\0');
  read_bytes(x.data(), x.size());
  return x;
}

Value read_value(const std::vector<Block>& blocks) {
  Value x;
  switch (read<char>()) {
    case 'i':
      x.kind = Value::integer;
      x.number = read<int64_t>();
      break;
    case 'd':
      x.kind = Value::real;
      x.fraction = read<double>();
      break;
    case 's':
      x.kind = Value::text;
      x.characters = read_text();
      break;
    case 'p': {  // an address: a block, and an offset in it
      x.kind = Value::integer;
      const Block& block = blocks.at(read<int64_t>());
      x.number = reinterpret_cast<int64_t>(block.data + read<int64_t>());
      break;
    }
    case 't':
      x.kind = Value::tuple;
      for (int64_t left = read<int64_t>(); left > 0; --left) x.items.push_back(read_value(blocks));
      break;
    default: throw std::invalid_argument("a value of an unknown kind");
  }
  return x;
}

void write_bytes(const void* from, size_t size) {
  if (size) std::fwrite(from, size, 1, stdout);
}

}  // namespace

int main() {
  pybind11::module_ m;
  define_module(m);
  for (;;) {
    const std::string name = read_text();
    std::vector<Block> blocks;
    for (int64_t left = read<int64_t>(); left > 0; --left) {
      const int64_t address = read<int64_t>();
      blocks.emplace_back(address, read<int64_t>());
      read_bytes(blocks.back().data, blocks.back().size);
    }
    const Value arguments = read_value(blocks);
    const Value result = m.functions.at(name)(arguments.items);
    const int64_t length = static_cast<int64_t>(result.characters.size());
    write_bytes(&result.number, sizeof(result.number));
    write_bytes(&length, sizeof(length));
    write_bytes(result.characters.data(), result.characters.size());
    for (const Block& block : blocks) write_bytes(block.data, block.size);
    std::fflush(stdout);
  }
}
