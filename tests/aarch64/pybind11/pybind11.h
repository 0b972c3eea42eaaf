// As much of pybind11 as csrc/ uses, for a program without Python: its objects are values that main.cpp reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// ---- Python's own functions, on the values below ------------------------------------------------------------

namespace pybind11 {
struct Value;
}
using PyObject = const pybind11::Value;
using Py_ssize_t = std::ptrdiff_t;

PyObject* PyTuple_GetItem(PyObject* tuple, Py_ssize_t i);
double PyFloat_AsDouble(PyObject* value);
long long PyLong_AsLongLong(PyObject* value);
inline bool PyErr_Occurred() { return false; }
#define PyTuple_GET_ITEM PyTuple_GetItem

namespace pybind11 {

// A number, a text, or a tuple.
struct Value {
  enum Kind { none, integer, real, text, tuple } kind = none;
  int64_t number = 0;  // or an address
  double fraction = 0;
  std::string characters;
  std::vector<Value> items;
};

class tuple;

class handle {
 public:
  handle(const Value& value) : value_(&value) {}
  handle(PyObject* value) : value_(value) {}

  PyObject* ptr() const { return value_; }
  explicit operator bool() const { return value_; }

  template <typename T>
  T cast() const {
    if constexpr (std::is_same_v<T, tuple>) return T(*value_);
    else if constexpr (std::is_same_v<T, std::string>) return value_->characters;
    else return static_cast<T>(value_->kind == Value::real ? value_->fraction : static_cast<T>(value_->number));
  }

 protected:
  const Value* value_;
};

class tuple : public handle {
 public:
  using handle::handle;
  bool empty() const { return value_->items.empty(); }
  size_t size() const { return value_->items.size(); }
};

// All arguments of a call.
class args : public tuple {
 public:
  using tuple::tuple;
};

struct type_error : std::invalid_argument {
  using invalid_argument::invalid_argument;
};

struct error_already_set : std::exception {};

struct gil_scoped_release {
  ~gil_scoped_release() {}  // used, for the compiler
};

inline Value result_of(int64_t x) { return {Value::integer, x, 0, {}, {}}; }
inline Value result_of(const char* x) { return {Value::text, 0, 0, x, {}}; }

class module_ {
 public:
  std::map<std::string, std::function<Value(const std::vector<Value>&)>> functions;

  std::string& doc() { return doc_; }

  template <typename F>
  void def(const char* name, F function) {
    add(name, std::function(function));
  }

 private:
  void add(const char* name, std::function<void(const args&)> function) {
    functions[name] = [=](const std::vector<Value>& arguments) {
      const Value all{Value::tuple, 0, 0, {}, arguments};
      return function(args(all)), Value();
    };
  }

  template <typename R, typename... A>
  void add(const char* name, std::function<R(A...)> function) {
    functions[name] = [=](const std::vector<Value>& arguments) {
      if (arguments.size() != sizeof...(A)) throw std::invalid_argument("number of arguments");
      return call(function, arguments, std::index_sequence_for<A...>());
    };
  }

  template <typename R, typename... A, size_t... I>
  static Value call(const std::function<R(A...)>& function, const std::vector<Value>& arguments,
                    std::index_sequence<I...>) {
    const auto run = [&] { return function(handle(arguments[I]).cast<std::decay_t<A>>()...); };
    if constexpr (std::is_void_v<R>) return run(), Value();
    else return result_of(run());
  }

  std::string doc_;
};

}  // namespace pybind11

inline PyObject* PyTuple_GetItem(PyObject* tuple, Py_ssize_t i) { return &tuple->items.at(i); }
inline double PyFloat_AsDouble(PyObject* value) { return pybind11::handle(value).cast<double>(); }
inline long long PyLong_AsLongLong(PyObject* value) { return pybind11::handle(value).cast<long long>(); }

#define PYBIND11_MODULE(name, m) void define_module(pybind11::module_& m)
